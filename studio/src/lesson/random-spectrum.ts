/** Singular values of a large square random matrix with the same norm: the quarter-circle law (Marchenko and Pastur 1967). */

const CELLS = 2000;

/** As many values as given, largest first, with the same sum of squares. */
export function ofRandom(values: readonly number[]): number[] {
  const n = values.length;
  const quantiles = quarterCircle(n);
  const size = (among: readonly number[]) => Math.sqrt(among.reduce((sum, v) => sum + v * v, 0));
  const factor = size(values) / (size(quantiles) || 1);
  return quantiles.map((v) => v * factor);
}

/** The middles of n equal shares of the density sqrt(4 - x^2) / pi on [0, 2], largest first. */
function quarterCircle(n: number): number[] {
  const found: number[] = [];
  let mass = 0;
  for (let cell = CELLS - 1; cell >= 0 && found.length < n; cell--) {
    const x = (2 * (cell + 0.5)) / CELLS;
    mass += (Math.sqrt(4 - x * x) / Math.PI) * (2 / CELLS);
    while (found.length < n && mass >= (found.length + 0.5) / n) found.push(x);
  }
  while (found.length < n) found.push(0);
  return found;
}
