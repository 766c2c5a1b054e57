import { describe, expect, it } from 'vitest';
import cases from './cases.json';
import { fresh, gradients, Training, type Layer } from './descent';
import * as lowrank from './lowrank';
import { fromRows, norm, product, toRows, transposed, zeros, type Matrix } from './matrix';
import { normal } from './random';
import { rankOf, singularValues, svd, triangular } from './svd';

// Python wrote the cases (studio/make_cases.py): torch, NumPy and twofold.lowrank say what is right.

function near(found: readonly number[], expected: readonly number[], tolerance = 1e-9): void {
  expect(found.length).toBe(expected.length);
  found.forEach((v, i) => expect(Math.abs(v - (expected[i] as number))).toBeLessThanOrEqual(tolerance));
}

function difference(a: Matrix, b: Matrix): number {
  return norm({ ...a, data: a.data.map((v, i) => v - (b.data[i] as number)) });
}

describe('what an update costs', () => {
  it.each(cases.parameters)('$rows x $columns at rank $r', ({ rows, columns, r, full, lora }) => {
    expect(lowrank.fullParameters(rows, columns)).toBe(full);
    expect(lowrank.loraParameters(rows, columns, r)).toBe(lora);
  });

  it('is 256 times less than all of a 4096 x 4096 weight at rank 8', () => {
    expect(lowrank.fullParameters(4096, 4096)).toBe(16_777_216);
    expect(lowrank.loraParameters(4096, 4096, 8)).toBe(65_536);
  });

  it.each(cases.scales)('alpha $alpha at rank $r', ({ alpha, r, plain, stabilised }) => {
    expect(lowrank.scaleOf(alpha, r)).toBeCloseTo(plain, 14);
    expect(lowrank.scaleOf(alpha, r, true)).toBeCloseTo(stabilised, 14);
  });
});

describe.each(cases.updates)('an update of $B.length x $A.0.length', (update) => {
  const B = fromRows(update.B);
  const A = fromRows(update.A);
  const values = singularValues(B, A, update.scale);

  it('has the product that torch forms', () => {
    near(toRows(product(B, A, update.scale)).flat(), update.delta.flat());
  });

  it('has the singular values and ranks', () => {
    near(values, update.singular_values.concat(Array<number>(values.length - update.singular_values.length).fill(0)));
    expect(rankOf(values, Math.max(B.rows, A.columns))).toBe(update.rank);
    expect(lowrank.stableRank(values)).toBeCloseTo(update.stable_rank, 9);
    expect(lowrank.effectiveRank(values)).toBeCloseTo(update.effective_rank, 6);
    for (const [share, r] of update.energy_ranks) expect(lowrank.energyRank(values, share as number)).toBe(r);
  });

  it('keeps and loses what Python says when it is cut', () => {
    for (const { r, energy, error } of update.truncations) {
      expect(lowrank.energyKept(values, r)).toBeCloseTo(energy, 9);
      expect(lowrank.truncationError(values, r)).toBeCloseTo(error, 7);
    }
  });
});

describe('the singular value decomposition', () => {
  it.each(cases.matrices)('has the values that NumPy finds', ({ rows, singular_values }) => {
    near(svd(fromRows(rows)).values, singular_values);
  });

  it.each(cases.matrices)('puts the matrix together again', ({ rows }) => {
    const m = fromRows(rows);
    const { U, values, V } = svd(m);
    const stretched = { ...U, data: U.data.map((v, i) => v * (values[i % U.columns] as number)) };
    expect(difference(product(stretched, transposed(V)), m)).toBeLessThan(1e-12);
    expect(difference(product(transposed(V), V), svdIdentity(V.columns))).toBeLessThan(1e-12);
  });

  it('has a triangular factor with the same Gram matrix', () => {
    const m = fromRows(cases.matrices[1]!.rows);
    const r = triangular(m);
    expect(difference(product(transposed(r), r), product(transposed(m), m))).toBeLessThan(1e-12);
  });
});

function svdIdentity(n: number): Matrix {
  const made = zeros(n, n);
  for (let i = 0; i < n; i++) made.data[i * n + i] = 1;
  return made;
}

describe('learning', () => {
  it.each(cases.descents)('takes the steps that torch takes, scale $scale', (one) => {
    const layer: Layer = { A: fromRows(one.A), B: zeros(one.target.length, one.A.length), scale: one.scale };
    const training = new Training(layer, fromRows(one.target), one.rate);
    for (let i = 0; i < 5; i++) training.step();
    near(training.losses, one.losses);
    near(toRows(layer.A).flat(), one.A_after.flat());
    near(toRows(layer.B).flat(), one.B_after.flat());
  });

  it('gives A no gradient while B is zero, and B one', () => {
    const layer = fresh(6, 5, 2, 1, normal(1));
    const target = fromRows(cases.updates[0]!.delta);
    const found = gradients(layer, target);
    expect(norm(found.A)).toBe(0);
    expect(norm(found.B)).toBeGreaterThan(0.1);
  });
});
