/** A run's events as columns, one per quantity, growing as they come. */

import type { EvaluatedEvent, RunEvent, SpectrumEvent, StepEvent } from '../types';

export const QUANTITIES = ['loss', 'learning_rate', 'gradient_norm', 'tokens_per_second', 'memory_bytes'] as const;
export type Quantity = (typeof QUANTITIES)[number];

export class RunSeries {
  steps: number[] = [];
  columns: Record<Quantity, number[]> = {
    loss: [],
    learning_rate: [],
    gradient_norm: [],
    tokens_per_second: [],
    memory_bytes: [],
  };
  last: StepEvent | null = null;
  evaluations: EvaluatedEvent[] = [];
  spectra: SpectrumEvent[] = [];
  notes: { step: number; kind: 'warned' | 'message' | 'checkpointed'; text: string }[] = [];

  /** Take one event. A run that was resumed counts again from its checkpoint: what came after that is forgotten, as on disk. */
  add(event: RunEvent): void {
    if (event.event === 'step') this.step(event);
    else if (event.event === 'evaluated') this.evaluations.push(event);
    else if (event.event === 'spectrum') this.spectra.push(event);
    else if (event.event === 'warned' || event.event === 'message') this.note(event.event, event.text);
    else if (event.event === 'checkpointed') this.note('checkpointed', `checkpoint at step ${event.step}`);
  }

  private step(event: StepEvent): void {
    if (event.step <= (this.steps.at(-1) ?? -1)) this.back(event.step);
    this.steps.push(event.step);
    for (const name of QUANTITIES) this.columns[name].push(event[name]);
    this.last = event;
  }

  private back(step: number): void {
    const kept = this.steps.findIndex((s) => s >= step);
    this.steps.length = kept;
    for (const name of QUANTITIES) this.columns[name].length = kept;
    this.evaluations = this.evaluations.filter((e) => e.step < step);
    this.spectra = this.spectra.filter((e) => e.step < step);
    this.notes = this.notes.filter((e) => e.step < step);
  }

  private note(kind: 'warned' | 'message' | 'checkpointed', text: string): void {
    this.notes.push({ step: this.last?.step ?? 0, kind, text });
  }
}
