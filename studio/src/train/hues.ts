/** How runs are told apart: by colour and, for those who see no colours, by dashes. */

const DASHES: (number[] | undefined)[] = [undefined, [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 6]];

export function hue(index: number): string {
  return `--series-${(index % 6) + 1}`;
}

export function dash(index: number): number[] | undefined {
  return DASHES[index % DASHES.length];
}
