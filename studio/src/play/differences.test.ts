import { expect, it } from 'vitest';
import { differing } from './differences';

it('marks what the other answer has not', () => {
  expect(differing(['a', 'b', 'c', 'd'], ['a', 'x', 'c', 'd'])).toEqual([false, true, false, false]);
  expect(differing(['a'], [])).toEqual([true]);
  expect(differing([], ['a'])).toEqual([]);
  expect(differing(['so', 'it', 'is'], ['so', 'it', 'is'])).toEqual([false, false, false]);
});
