import { expect, it } from 'vitest';
import type { StepEvent } from '../types';
import { RunSeries } from './series';

function step(n: number, loss: number): StepEvent {
  return {
    event: 'step',
    step: n,
    steps: 9,
    epoch: 0,
    loss,
    learning_rate: 1e-3,
    gradient_norm: 1,
    tokens: 10,
    supervised_tokens: 5,
    seconds: 1,
    tokens_per_second: 10,
    memory_bytes: 1e9,
    seconds_left: 9 - n,
  };
}

it('forgets what a resumed run does again', () => {
  const series = new RunSeries();
  for (let n = 1; n <= 5; n++) series.add(step(n, n));
  series.add({ event: 'evaluated', step: 5, loss: 2, token_accuracy: 0.5, best: true });
  series.add({ event: 'spectrum', step: 2, modules: { m: [1] } });
  series.add(step(4, 40));
  expect(series.steps).toEqual([1, 2, 3, 4]);
  expect(series.columns.loss).toEqual([1, 2, 3, 40]);
  expect(series.evaluations).toEqual([]);
  expect(series.spectra.map((s) => s.step)).toEqual([2]);
});
