import { expect, test } from 'vitest';
import { tick } from '../ui/format';
import { even } from './ticks';

test.each([
  [1.52, '0 0.5 1 1.5'],
  [4.06, '0 1 2 3 4'],
  [160, '0 50 100 150'],
  [40, '0 10 20 30 40'],
  [1, '0 0.2 0.4 0.6 0.8 1'],
  [0.007, '0 0.002 0.004 0.006'],
])('the grid up to %s', (high, shown) => {
  expect(even(high).map(tick).join(' ')).toBe(shown);
});
