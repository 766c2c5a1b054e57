/** What the small layers of the lesson are to learn: a square update of low rank, and a little of every direction. */

import { product, zeros, type Matrix } from '../maths/matrix';
import { normal } from '../maths/random';

const STRENGTH = 0.8;
const NOISE = 0.01;

export function hidden(d: number, rank: number): Matrix {
  const draw = normal(5);
  const B = zeros(d, rank);
  const A = zeros(rank, d);
  B.data.forEach((_, i) => (B.data[i] = (draw() * STRENGTH) / (1 + (i % rank) * 0.45)));
  A.data.forEach((_, i) => (A.data[i] = draw() / Math.sqrt(d)));
  const made = product(B, A);
  made.data.forEach((v, i) => (made.data[i] = v + NOISE * draw()));
  return made;
}
