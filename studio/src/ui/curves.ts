/** Lines of a chart: thinned, brought onto one axis, and put into words. */

import uPlot from 'uplot';

export interface Line {
  label: string;
  x: number[];
  y: number[];
  /** The name of a design token, such as `--series-1`. */
  hue: string;
  dash?: number[];
  points?: boolean;
  width?: number;
}

export interface Points {
  x: number[];
  y: number[];
}

/** At most about 2 · `stretches` points that look, at that width, like all of them: the least and the greatest of each stretch
 * and both ends stay, so no spike is lost and no end is cut. */
export function thinned({ x, y }: Points, stretches: number): Points {
  if (x.length <= 2 * stretches) return { x, y };
  const kept = new Set([0, x.length - 1]);
  const size = x.length / stretches;
  for (let i = 0; i < stretches; i++) {
    const [low, high] = extremes(y, Math.floor(i * size), Math.floor((i + 1) * size));
    kept.add(low).add(high);
  }
  const order = [...kept].sort((a, b) => a - b);
  return { x: order.map((i) => x[i]!), y: order.map((i) => y[i]!) };
}

function extremes(y: number[], from: number, to: number): [number, number] {
  let low = from;
  let high = from;
  for (let i = from + 1; i < to; i++) {
    if (y[i]! < y[low]!) low = i;
    if (y[i]! > y[high]!) high = i;
  }
  return [low, high];
}

export function joined(lines: readonly Line[], width: number): uPlot.AlignedData {
  const tables = lines.map((line) => thinned(line, width)).map(({ x, y }): uPlot.AlignedData => [x, y]);
  return tables.length === 0 ? [[]] : tables.length === 1 ? tables[0]! : uPlot.join(tables);
}

/** Each line's value at `x`, or the last one before it. */
export function valuesAt(lines: readonly Line[], x: number): { label: string; value: number; hue: string }[] {
  return lines.flatMap(({ label, hue, x: xs, y }) => {
    const value = y[lastNotAbove(xs, x)];
    return value === undefined ? [] : [{ label, hue, value }];
  });
}

function lastNotAbove(xs: readonly number[], x: number): number {
  let [low, high] = [0, xs.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle]! <= x) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** What a reader who does not see the chart is told of it. */
export function summary(lines: readonly Line[], shown: (value: number) => string): string {
  if (lines.length > 6) return `${lines.length} curves`;
  const told = lines
    .filter((line) => line.y.length > 0)
    .map(({ label, y }) => `${label}: ${y.length} points, from ${shown(y[0]!)} to ${shown(y.at(-1)!)}`);
  return told.join('; ') || 'Nothing yet';
}
