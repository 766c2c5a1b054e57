/** Matrices small enough to be seen, row by row in one array. */

export interface Matrix {
  rows: number;
  columns: number;
  data: Float64Array;
}

export function zeros(rows: number, columns: number): Matrix {
  return { rows, columns, data: new Float64Array(rows * columns) };
}

export function fromRows(rows: readonly (readonly number[])[]): Matrix {
  return { rows: rows.length, columns: rows[0]?.length ?? 0, data: Float64Array.from(rows.flat()) };
}

export function toRows(m: Matrix): number[][] {
  return Array.from({ length: m.rows }, (_, i) => Array.from(m.data.subarray(i * m.columns, (i + 1) * m.columns)));
}

export function transposed(m: Matrix): Matrix {
  const made = zeros(m.columns, m.rows);
  for (let i = 0; i < m.rows; i++)
    for (let j = 0; j < m.columns; j++) made.data[j * m.rows + i] = m.data[i * m.columns + j] as number;
  return made;
}

/** scale * left @ right. */
export function product(left: Matrix, right: Matrix, scale = 1): Matrix {
  if (left.columns !== right.rows)
    throw new Error(`(${left.rows}, ${left.columns}) times (${right.rows}, ${right.columns})`);
  const made = zeros(left.rows, right.columns);
  const n = right.columns;
  for (let i = 0; i < left.rows; i++)
    for (let k = 0; k < left.columns; k++) {
      const factor = scale * (left.data[i * left.columns + k] as number);
      for (let j = 0; j < n; j++) made.data[i * n + j]! += factor * (right.data[k * n + j] as number);
    }
  return made;
}

/** The Frobenius norm. */
export function norm(m: Matrix): number {
  return Math.sqrt(m.data.reduce((sum, v) => sum + v * v, 0));
}
