/** Sizes of updates from their singular values. */

/** The Frobenius norm of a matrix with these singular values. */
export function norm(values: readonly number[]): number {
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
}

export function ordered(values: readonly number[]): number[] {
  return [...values].sort((a, b) => b - a);
}
