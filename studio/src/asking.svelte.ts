/** One question at a time to the server: a newer one calls off the older, and the last answer stays until the next is there. */

import { cancelled, said } from './api';

export class Asking<T> {
  answer = $state.raw<T | null>(null);
  problem = $state<string | null>(null);
  busy = $state(false);
  private control: AbortController | null = null;
  private timer = 0;

  /** Ask at once, or after `wait` milliseconds in which nothing newer is asked. */
  ask(call: (signal: AbortSignal) => Promise<T>, wait = 0): void {
    this.cancel();
    this.busy = true;
    const mine = (this.control = new AbortController());
    this.timer = window.setTimeout(() => void this.wait(call, mine), wait);
  }

  private async wait(call: (signal: AbortSignal) => Promise<T>, mine: AbortController): Promise<void> {
    try {
      const answer = await call(mine.signal);
      if (mine !== this.control) return;
      this.answer = answer;
      this.problem = null;
    } catch (error) {
      if (mine !== this.control || cancelled(error)) return;
      this.problem = said(error);
    }
    this.busy = false;
  }

  forget(): void {
    this.cancel();
    this.answer = null;
    this.problem = null;
  }

  cancel(): void {
    window.clearTimeout(this.timer);
    this.control?.abort();
    this.control = null;
    this.busy = false;
  }
}
