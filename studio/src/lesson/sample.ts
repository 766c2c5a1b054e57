/** What was measured of the sample that ships with the studio (studio/make_sample.py). */

import measured from './measured-sample.json';

export const sample = measured;

export function isSample(id: string): boolean {
  return id === 'sample/home-intents';
}

/** Held-out loss with every module cut to the nearest rank that was measured, not above r. */
export function sampleLoss(r: number): { value: number; note: string } | null {
  const found = measured.loss_by_rank.findLast(([rank]) => (rank as number) <= r);
  if (!found) return null;
  const [rank, value] = found as [number, number];
  return { value, note: rank === 0 ? 'the base without the adapter' : `all modules cut to rank ${rank}, measured` };
}
