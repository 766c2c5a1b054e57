import { expect, it } from 'vitest';
import { gridOf, key, place } from './modules';

it('places a module by its layer and kind', () => {
  expect(place('model.layers.12.self_attn.q_proj')).toMatchObject({ layer: '12', kind: 'q_proj' });
  expect(place('model.layers.3.mlp.experts.gate_up_proj')).toMatchObject({ layer: '3', kind: 'experts.gate_up_proj' });
  expect(place('lm_head')).toMatchObject({ layer: '–', kind: 'lm_head' });
});

it('orders layers as numbers', () => {
  const names = [10, 2, 1].map((n) => `model.layers.${n}.mlp.up_proj`);
  const grid = gridOf(names);
  expect(grid.layers).toEqual(['1', '2', '10']);
  expect(grid.at.get(key('10', 'up_proj'))?.name).toBe(names[0]);
});
