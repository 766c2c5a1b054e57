/** Which pieces of an answer are not in another one: what is left when the longest common run of pieces is taken out. */

/** For each piece of `own`, whether it differs from `other`; the order of what both share is kept. */
export function differing(own: readonly string[], other: readonly string[]): boolean[] {
  const common = lengths(own, other);
  const differs = own.map(() => true);
  let [i, j] = [0, 0];
  while (i < own.length && j < other.length) {
    if (own[i] === other[j]) {
      differs[i] = false;
      i += 1;
      j += 1;
    } else if (common[i + 1]![j]! >= common[i]![j + 1]!) i += 1;
    else j += 1;
  }
  return differs;
}

/** Lengths of the longest common subsequence of what follows i and j. */
function lengths(a: readonly string[], b: readonly string[]): Uint16Array[] {
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    const [row, below] = [table[i]!, table[i + 1]!];
    for (let j = b.length - 1; j >= 0; j--) {
      row[j] = a[i] === b[j] ? below[j + 1]! + 1 : Math.max(below[j]!, row[j + 1]!);
    }
  }
  return table;
}
