/**
 * Singular values by one-sided Jacobi rotations (Hestenes 1958): pairs of columns are turned until all are orthogonal; their lengths
 * are then the singular values. Slow for large matrices, accurate for small ones, and those are all that factors need:
 * the values of B A are those of the (r, r) matrix R_B R_A^T, where R_B and R_A come from thin QR decompositions.
 */

import { product, transposed, zeros, type Matrix } from './matrix';

const SWEEPS = 40;
const SETTLED = 1e-14;

export interface Decomposition {
  /** (rows, k), (k), (columns, k): m = U diag(values) V^T, largest values first. */
  U: Matrix;
  values: number[];
  V: Matrix;
}

/** Columns as arrays of their own: the rotations read and write them whole. */
function columnsOf(m: Matrix): Float64Array[] {
  const t = transposed(m);
  return Array.from({ length: t.rows }, (_, i) => t.data.slice(i * t.columns, (i + 1) * t.columns));
}

function fromColumns(columns: readonly Float64Array[], rows: number): Matrix {
  const made = zeros(rows, columns.length);
  columns.forEach((column, j) => column.forEach((v, i) => (made.data[i * columns.length + j] = v)));
  return made;
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] as number) * (b[i] as number);
  return sum;
}

function turn(a: Float64Array, b: Float64Array, c: number, s: number): void {
  for (let i = 0; i < a.length; i++) {
    const x = a[i] as number;
    const y = b[i] as number;
    a[i] = c * x - s * y;
    b[i] = s * x + c * y;
  }
}

/** Makes two columns orthogonal, and turns the same pair of `also`; says whether they were not yet. */
function rotated(columns: Float64Array[], also: Float64Array[], p: number, q: number): boolean {
  const [a, b] = [columns[p] as Float64Array, columns[q] as Float64Array];
  const [aa, bb, ab] = [dot(a, a), dot(b, b), dot(a, b)];
  if (Math.abs(ab) <= SETTLED * Math.sqrt(aa * bb) || ab === 0) return false;
  const zeta = (bb - aa) / (2 * ab);
  const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
  const c = 1 / Math.hypot(1, t);
  turn(a, b, c, c * t);
  turn(also[p] as Float64Array, also[q] as Float64Array, c, c * t);
  return true;
}

function identity(n: number): Float64Array[] {
  return Array.from({ length: n }, (_, i) => Float64Array.from({ length: n }, (_, j) => (i === j ? 1 : 0)));
}

export function svd(m: Matrix): Decomposition {
  if (m.rows < m.columns) {
    const { U, values, V } = svd(transposed(m));
    return { U: V, values, V: U };
  }
  const columns = columnsOf(m);
  const turned = identity(m.columns);
  for (let sweep = 0, moving = true; moving && sweep < SWEEPS; sweep++) {
    moving = false;
    for (let p = 0; p < m.columns; p++)
      for (let q = p + 1; q < m.columns; q++) moving = rotated(columns, turned, p, q) || moving;
  }
  return sorted(columns, turned, m.rows);
}

function sorted(columns: Float64Array[], turned: Float64Array[], rows: number): Decomposition {
  const lengths = columns.map((c) => Math.sqrt(dot(c, c)));
  const order = lengths.map((_, i) => i).sort((i, j) => (lengths[j] as number) - (lengths[i] as number));
  const values = order.map((i) => lengths[i] as number);
  const units = order.map((i) =>
    (columns[i] as Float64Array).map((v) => (lengths[i] ? v / (lengths[i] as number) : 0)),
  );
  return {
    U: fromColumns(units, rows),
    values,
    V: fromColumns(
      order.map((i) => turned[i] as Float64Array),
      turned.length,
    ),
  };
}

/** The triangular factor of a thin QR decomposition, by modified Gram-Schmidt done twice: (k, k) for k columns. */
export function triangular(m: Matrix): Matrix {
  const columns = columnsOf(m);
  const r = zeros(m.columns, m.columns);
  columns.forEach((column, j) => {
    for (let pass = 0; pass < 2; pass++)
      for (let i = 0; i < j; i++) {
        const unit = columns[i] as Float64Array;
        const share = dot(unit, column);
        r.data[i * m.columns + j]! += share;
        for (let n = 0; n < column.length; n++) column[n]! -= share * (unit[n] as number);
      }
    const length = Math.sqrt(dot(column, column));
    r.data[j * m.columns + j] = length;
    if (length > 0) for (let n = 0; n < column.length; n++) column[n]! /= length;
  });
  return r;
}

/** Singular values of scale * B @ A, (out, r) times (r, in), without forming it: largest first. */
export function singularValues(B: Matrix, A: Matrix, scale = 1): number[] {
  const core = product(triangular(B), transposed(triangular(transposed(A))));
  return svd(core).values.map((v) => v * Math.abs(scale));
}

/** How many singular values are no rounding error, as NumPy's matrix_rank counts them. */
export function rankOf(values: readonly number[], size: number): number {
  const least = (values[0] ?? 0) * size * Number.EPSILON;
  return values.filter((v) => v > least).length;
}
