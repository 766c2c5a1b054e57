/** The same layer with its update apart and folded in, timed by turns on this machine. */

export interface Measured {
  rounds: number;
  /** Milliseconds of one input, medians. */
  apart: number;
  folded: number;
  /** The largest difference between the two answers, and the largest answer. */
  difference: number;
  largest: number;
}

/** y += scale * m @ x, with m row by row. */
function times(m: Float32Array, x: Float32Array, y: Float32Array, scale: number): void {
  const n = x.length;
  for (let i = 0, at = 0; i < y.length; i++) {
    let sum = 0;
    for (let j = 0; j < n; j++, at++) sum += (m[at] as number) * (x[j] as number);
    y[i] = (y[i] as number) + scale * sum;
  }
}

function drawn(count: number, size: number, draw: () => number): Float32Array {
  return Float32Array.from({ length: count }, () => size * draw());
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1] ?? 0;
}

export class Folding {
  static readonly ROUNDS = 30;
  /** Inputs in a round: clocks of browsers are coarse. */
  private static readonly INPUTS = 4;
  private static readonly SCALE = 2;
  private readonly W: Float32Array;
  private readonly A: Float32Array;
  private readonly B: Float32Array;
  private readonly merged: Float32Array;
  private readonly x: Float32Array;
  private readonly h: Float32Array;
  private readonly answers: [Float32Array, Float32Array];
  private readonly spent: { apart: number[]; folded: number[] } = { apart: [], folded: [] };

  constructor(
    readonly d: number,
    readonly r: number,
    draw: () => number,
  ) {
    this.W = drawn(d * d, 1 / Math.sqrt(d), draw);
    this.A = drawn(r * d, 1 / Math.sqrt(d), draw);
    this.B = drawn(d * r, 0.1, draw);
    this.x = drawn(d, 1, draw);
    this.h = new Float32Array(r);
    this.answers = [new Float32Array(d), new Float32Array(d)];
    this.merged = this.folded();
  }

  private folded(): Float32Array {
    const { d, r, A, B } = this;
    const sum = this.W.slice();
    for (let i = 0; i < d; i++)
      for (let k = 0; k < r; k++) {
        const factor = Folding.SCALE * (B[i * r + k] as number);
        for (let j = 0; j < d; j++) sum[i * d + j]! += factor * (A[k * d + j] as number);
      }
    return sum;
  }

  /** Some inputs through each way, and what all rounds so far say. */
  round(): Measured {
    const start = performance.now();
    for (let i = 0; i < Folding.INPUTS; i++) this.throughParts();
    const middle = performance.now();
    for (let i = 0; i < Folding.INPUTS; i++) this.throughWhole();
    const end = performance.now();
    this.spent.apart.push((middle - start) / Folding.INPUTS);
    this.spent.folded.push((end - middle) / Folding.INPUTS);
    return this.told();
  }

  private throughParts(): void {
    const [y] = this.answers;
    y.fill(0);
    this.h.fill(0);
    times(this.W, this.x, y, 1);
    times(this.A, this.x, this.h, 1);
    times(this.B, this.h, y, Folding.SCALE);
  }

  private throughWhole(): void {
    const [, y] = this.answers;
    y.fill(0);
    times(this.merged, this.x, y, 1);
  }

  private told(): Measured {
    const [apart, folded] = this.answers;
    const off = apart.map((v, i) => Math.abs(v - (folded[i] as number)));
    return {
      rounds: this.spent.apart.length,
      apart: median(this.spent.apart),
      folded: median(this.spent.folded),
      difference: Math.max(...off),
      largest: Math.max(...apart.map(Math.abs)),
    };
  }
}
