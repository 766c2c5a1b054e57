/**
 * LoRA learning a matrix: the smallest training that is real. The layer should add `target` to its frozen weight; its inputs are
 * white, so that the mean squared error is ||scale B A - target||^2 / rows, and its gradients are exact:
 *   G = 2 (scale B A - target) / rows,   dB = scale G A^T,   dA = scale B^T G.
 */

import { product, transposed, zeros, type Matrix } from './matrix';

export interface Layer {
  A: Matrix;
  B: Matrix;
  scale: number;
}

export interface Gradients {
  loss: number;
  A: Matrix;
  B: Matrix;
}

export function gradients({ A, B, scale }: Layer, target: Matrix): Gradients {
  const error = product(B, A, scale);
  let sum = 0;
  for (let i = 0; i < error.data.length; i++) {
    const off = (error.data[i] as number) - (target.data[i] as number);
    sum += off * off;
    error.data[i] = (2 * off) / target.rows;
  }
  return {
    loss: sum / target.rows,
    A: product(transposed(B), error, scale),
    B: product(error, transposed(A), scale),
  };
}

/** How a gradient becomes a step; `at` counts steps from 1. */
export interface Optimiser {
  step(values: Matrix, gradient: Matrix, at: number): void;
}

/** Plain gradient descent. */
export class Descent implements Optimiser {
  constructor(readonly rate: number) {}

  step(values: Matrix, gradient: Matrix): void {
    for (let i = 0; i < values.data.length; i++) values.data[i]! -= this.rate * (gradient.data[i] as number);
  }
}

/** Adam (arXiv 1412.6980) for one matrix, with PyTorch's defaults. */
export class Adam implements Optimiser {
  private readonly mean: Float64Array;
  private readonly square: Float64Array;

  constructor(
    readonly rate: number,
    shape: Matrix,
    private readonly beta1 = 0.9,
    private readonly beta2 = 0.999,
    private readonly epsilon = 1e-8,
  ) {
    this.mean = new Float64Array(shape.data.length);
    this.square = new Float64Array(shape.data.length);
  }

  step(values: Matrix, gradient: Matrix, at: number): void {
    const [c1, c2] = [1 - this.beta1 ** at, 1 - this.beta2 ** at];
    for (let i = 0; i < values.data.length; i++) {
      const g = gradient.data[i] as number;
      const m = (this.mean[i] = this.beta1 * (this.mean[i] as number) + (1 - this.beta1) * g);
      const v = (this.square[i] = this.beta2 * (this.square[i] as number) + (1 - this.beta2) * g * g);
      values.data[i]! -= (this.rate * (m / c1)) / (Math.sqrt(v / c2) + this.epsilon);
    }
  }
}

/** A layer that learns with Adam, step by step; `losses` begins with the one before any step. */
export class Training {
  readonly losses: number[];
  private readonly forA: Adam;
  private readonly forB: Adam;

  constructor(
    readonly layer: Layer,
    readonly target: Matrix,
    rate: number,
  ) {
    this.forA = new Adam(rate, layer.A);
    this.forB = new Adam(rate, layer.B);
    this.losses = [gradients(layer, target).loss];
  }

  get steps(): number {
    return this.losses.length - 1;
  }

  /** One step; returns the gradients that it took, as they were before it. */
  step(): Gradients {
    const found = gradients(this.layer, this.target);
    const at = this.steps + 1;
    this.forA.step(this.layer.A, found.A, at);
    this.forB.step(this.layer.B, found.B, at);
    this.losses.push(gradients(this.layer, this.target).loss);
    return found;
  }
}

/** A fresh LoRA layer: A at random, B zero. */
export function fresh(rows: number, columns: number, r: number, scale: number, draw: () => number): Layer {
  const A = zeros(r, columns);
  for (let i = 0; i < A.data.length; i++) A.data[i] = draw() / Math.sqrt(columns);
  return { A, B: zeros(rows, r), scale };
}
