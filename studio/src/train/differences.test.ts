import { expect, it } from 'vitest';
import { differences } from './differences';

it('names each differing key once, with every value', () => {
  const a = { base: 'x', adapter: { r: 8, target_modules: ['q'] }, output: 'runs/a' };
  const b = { base: 'x', adapter: { r: 16, target_modules: ['q'] }, training: { seed: 1 }, output: 'runs/b' };
  expect(differences([a, b])).toEqual([
    { key: 'adapter.r', values: ['8', '16'] },
    { key: 'training.seed', values: ['–', '1'] },
  ]);
});
