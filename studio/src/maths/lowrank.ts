/** What a low-rank update costs and keeps. The same formulas as `twofold.lowrank`; `cases.json` holds both to them. */

/** Values of a full update of a (rows, columns) weight. */
export function fullParameters(rows: number, columns: number): number {
  return rows * columns;
}

/** Values of B (rows, r) and A (r, columns) together. */
export function loraParameters(rows: number, columns: number, r: number): number {
  return r * (rows + columns);
}

/** alpha / r (arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). */
export function scaleOf(alpha: number, r: number, rankStabilised = false): number {
  return alpha / (rankStabilised ? Math.sqrt(r) : r);
}

function squares(values: readonly number[]): number {
  return values.reduce((sum, v) => sum + v * v, 0);
}

/** Share of the squared Frobenius norm that the first r singular values hold; 1 for a zero update. */
export function energyKept(values: readonly number[], r: number): number {
  const whole = squares(values);
  return whole > 0 ? squares(values.slice(0, r)) / whole : 1;
}

/** Frobenius norm of what the best rank-r update leaves out, over that of the whole (Eckart and Young 1936). */
export function truncationError(values: readonly number[], r: number): number {
  const whole = squares(values);
  return whole > 0 ? Math.sqrt(squares(values.slice(r)) / whole) : 0;
}

/** The smallest rank that keeps this share of the energy; 0 for a zero update. */
export function energyRank(values: readonly number[], share: number): number {
  const whole = squares(values);
  if (whole <= 0) return 0;
  let sum = 0;
  const at = values.findIndex((v) => (sum += v * v) / whole >= share);
  return at < 0 ? values.length : at + 1;
}

/** Squared Frobenius over squared spectral norm: 1 for one direction, r for r equal ones. */
export function stableRank(values: readonly number[]): number {
  const largest = values[0] ?? 0;
  return largest > 0 ? squares(values) / (largest * largest) : 0;
}

/** exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007). */
export function effectiveRank(values: readonly number[]): number {
  const sum = values.reduce((total, v) => total + v, 0);
  if (sum <= 0) return 0;
  return Math.exp(-values.reduce((total, v) => (v > 0 ? total + (v / sum) * Math.log(v / sum) : total), 0));
}

/** Bytes that a value takes while it is trained: itself, its gradient and AdamW's two moments, in float32 each. */
export const TRAINING_BYTES = 16;
/** Bytes of a value in a file of bfloat16. */
export const FILE_BYTES = 2;
