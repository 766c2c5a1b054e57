/** Where the lines of a chart's grid lie: round numbers from zero on, at most six of them, not above `high`. */
export function even(high: number): number[] {
  const least = high / 5;
  const unit = Math.pow(10, Math.floor(Math.log10(least)));
  const step = unit * ([1, 2, 2.5, 5, 10].find((times) => times * unit >= least * (1 - 1e-9)) ?? 10);
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => i * step);
}
