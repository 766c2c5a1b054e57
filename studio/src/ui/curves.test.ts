import { describe, expect, it } from 'vitest';
import { summary, thinned, valuesAt } from './curves';

function wave(count: number): { x: number[]; y: number[] } {
  const x = Array.from({ length: count }, (_, i) => i);
  return { x, y: x.map((i) => Math.sin(i / 50)) };
}

describe('thinning', () => {
  it('leaves short curves alone', () => {
    const short = wave(100);
    expect(thinned(short, 200)).toEqual(short);
  });

  it('keeps both ends and every spike of a long run', () => {
    const long = wave(1_000_000);
    long.y[123_457] = 40;
    long.y[876_543] = -40;
    const { x, y } = thinned(long, 800);
    expect(x.length).toBeLessThanOrEqual(1602);
    expect([x[0], x.at(-1)]).toEqual([0, 999_999]);
    expect(y[x.indexOf(123_457)]).toBe(40);
    expect(y[x.indexOf(876_543)]).toBe(-40);
  });

  it('keeps the order', () => {
    const { x } = thinned(wave(50_000), 300);
    expect(x).toEqual([...x].sort((a, b) => a - b));
  });
});

describe('reading a chart', () => {
  const line = { label: 'a', hue: '--series-1', x: [1, 5, 9], y: [10, 50, 90] };

  it('reads the last value at or before a step', () => {
    expect(valuesAt([line], 6).map((v) => v.value)).toEqual([50]);
    expect(valuesAt([line], 0)).toEqual([]);
  });

  it('says each curve in words', () => {
    expect(summary([line], String)).toBe('a: 3 points, from 10 to 90');
  });
});
