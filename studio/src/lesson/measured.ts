/** What was measured of a full fine-tuning whose updates were cut to low rank (studio/measure_full.py). */
export interface Measured {
  /** Pairs of a rank, 0 first, and the held-out loss at it. */
  loss_by_rank: [number, number][];
  modules: { name: string; shape: number[]; values: number[] }[];
}
