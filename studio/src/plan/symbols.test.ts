import { expect, it } from 'vitest';
import { symbolsIn } from './symbols';

it('finds each symbol once, and formulas within formulas', () => {
  const plan = {
    symbols: {
      L: { value: 30, meaning: 'layers' },
      P_train: { value: 8, meaning: 'that train' },
      e: { value: 2, meaning: 'bytes' },
    },
    formulas: { layer: 'T · e' },
  };
  expect(symbolsIn('max(0, 8 · P_train) + L · layer + L', plan)).toEqual([
    { name: 'P_train', value: 8, meaning: 'that train', formula: null },
    { name: 'L', value: 30, meaning: 'layers', formula: null },
    { name: 'layer', value: null, meaning: '', formula: 'T · e' },
    { name: 'e', value: 2, meaning: 'bytes', formula: null },
  ]);
});
