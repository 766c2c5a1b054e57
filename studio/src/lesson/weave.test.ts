import { describe, expect, it } from 'vitest';
import { product } from '../maths/matrix';
import { rankOf, singularValues } from '../maths/svd';
import { Weave } from './weave';

describe('the weave', () => {
  it.each([3, 12, 5, 1, 16])('holds B A after going to rank %i from wherever it was', (r) => {
    const weave = new Weave(24);
    for (const stop of [7, 20, r]) while (!weave.advance(stop, 1));
    const whole = product(weave.B(r), weave.A(r));
    weave.delta.forEach((v, i) => expect(v).toBeCloseTo(whole.data[i] as number, 4));
  });

  it.each([
    [8, 8],
    [64, 64],
    [512, 17],
  ])('at d = %i has rank %i where r is that', (d, r) => {
    const weave = new Weave(d);
    expect(rankOf(singularValues(weave.B(r), weave.A(r)), d)).toBe(r);
  });
});
