/**
 * B, A and B A, woven strand by strand: B A is the sum of r products of a column of B and a row of A, so that one more rank adds one
 * more product to what is there. A drag of the slider therefore costs one product a step, and a jump is spread over frames.
 *
 * The strands are sums of waves that grow finer with their number, drawn once over [0, 1] and sampled at d places: the same
 * matrices at every size.
 */

import { uniform } from '../maths/random';
import type { Matrix } from '../maths/matrix';

export const MOST = 64;
const WAVES = 3;

interface Wave {
  cycles: number;
  phase: number;
  size: number;
}

function waves(seed: number, k: number): Wave[] {
  const draw = uniform(seed * 7919 + k * 104729);
  return Array.from({ length: WAVES }, () => ({
    cycles: 0.4 + draw() * (1.2 + 0.75 * k),
    phase: draw() * 2 * Math.PI,
    size: 0.6 + 0.6 * draw(),
  }));
}

/** Strand k at d places; finer strands weigh less, so that broad patterns come first. */
function strand(seed: number, k: number, d: number): Float32Array {
  const parts = waves(seed, k);
  const weight = Math.pow(k + 1, -0.3);
  return Float32Array.from({ length: d }, (_, i) => {
    const t = (i + 0.5) / d;
    return weight * parts.reduce((sum, w) => sum + w.size * Math.sin(2 * Math.PI * w.cycles * t + w.phase), 0);
  });
}

export class Weave {
  /** Strands of B and of A that are in `delta`, row by row. */
  woven = 0;
  readonly delta: Float32Array;
  private readonly columns: Float32Array[];
  private readonly rows: Float32Array[];

  constructor(readonly d: number) {
    const count = Math.min(MOST, d);
    this.delta = new Float32Array(d * d);
    this.columns = Array.from({ length: count }, (_, k) => strand(1, k, d));
    this.rows = Array.from({ length: count }, (_, k) => strand(2, k, d));
  }

  /** Adds or takes away strands until there are r or the time is up; says whether it is done. */
  advance(r: number, milliseconds: number): boolean {
    const end = performance.now() + milliseconds;
    while (this.woven !== r) {
      if (r > this.woven) this.add(this.woven++, 1);
      else if (r === 0 || this.woven > 2 * r + 8) this.clear();
      else this.add(--this.woven, -1);
      if (performance.now() > end) break;
    }
    return this.woven === r;
  }

  private clear(): void {
    this.delta.fill(0);
    this.woven = 0;
  }

  private add(k: number, sign: number): void {
    const [column, row] = [this.columns[k] as Float32Array, this.rows[k] as Float32Array];
    const { d, delta } = this;
    for (let i = 0, at = 0; i < d; i++) {
      const factor = sign * (column[i] as number);
      for (let j = 0; j < d; j++, at++) delta[at] = (delta[at] as number) + factor * (row[j] as number);
    }
  }

  /** The size of entry that takes the full colour at rank r: the sizes of the strands, as if they were independent. */
  limit(r: number): number {
    let sum = 0;
    for (let k = 0; k < r; k++) sum += Math.pow(k + 1, -1.2);
    return 2.4 * Math.sqrt(sum);
  }

  /** One entry of B A at rank r. */
  entry(row: number, column: number, r: number): number {
    let sum = 0;
    for (let k = 0; k < r; k++) sum += (this.columns[k]?.[row] ?? 0) * (this.rows[k]?.[column] ?? 0);
    return sum;
  }

  /** B (d, r). */
  B(r: number): Matrix {
    const data = new Float64Array(this.d * r);
    for (let k = 0; k < r; k++) this.columns[k]!.forEach((v, i) => (data[i * r + k] = v));
    return { rows: this.d, columns: r, data };
  }

  /** A (r, d). */
  A(r: number): Matrix {
    const data = new Float64Array(r * this.d);
    for (let k = 0; k < r; k++) data.set(this.rows[k]!, k * this.d);
    return { rows: r, columns: this.d, data };
  }
}
