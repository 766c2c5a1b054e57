/** The runs that the server knows, and the events of those that are shown. What is on disk is the truth; this only follows it. */

import { api, said, ApiError } from '../api';
import type { Run, RunState, RunSummary } from '../types';
import { follow } from './follow';
import { RunSeries } from './series';

const EVERY = 2000;

export function isLive(state: RunState): boolean {
  return state === 'running' || state === 'starting' || state === 'stopping';
}

/** One shown run. `version` counts up, at most once a frame, as `series` grows. */
export class ShownRun {
  series = new RunSeries();
  version = $state(0);
  details = $state.raw<Run | null>(null);
  connected = $state(true);
  problem = $state<string | null>(null);
  private unfollow: (() => void) | null = null;
  private frame = 0;
  private loads = 0;

  constructor(readonly name: string) {}

  get following(): boolean {
    return this.unfollow !== null;
  }

  /** All events so far at once, then those to come while it runs. */
  async load(live: boolean): Promise<void> {
    this.leave();
    const load = ++this.loads;
    try {
      const [details, { events, cursor }] = await Promise.all([api.run(this.name), api.events(this.name)]);
      if (load !== this.loads) return;
      this.series = new RunSeries();
      for (const event of events) this.series.add(event);
      this.details = details;
      this.problem = null;
      this.connected = true;
      this.touched();
      if (live) this.follow(cursor);
    } catch (error) {
      if (load === this.loads) this.problem = said(error);
    }
  }

  private follow(cursor: string): void {
    this.unfollow = follow(this.name, cursor, {
      event: (event) => {
        this.series.add(event);
        this.touched();
      },
      anew: () => {
        this.series = new RunSeries();
        this.touched();
      },
      connected: (yes) => (this.connected = yes),
      ended: () => void this.load(false),
    });
  }

  private touched(): void {
    if (!this.frame) {
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.version += 1;
      });
    }
  }

  leave(): void {
    this.loads += 1;
    this.unfollow?.();
    this.unfollow = null;
  }
}

export class Runs {
  list = $state.raw<RunSummary[]>([]);
  loaded = $state(false);
  reachable = $state(true);
  problem = $state<string | null>(null);
  shown = $state.raw<ShownRun[]>([]);
  private timer = 0;
  private closed = false;

  start(): () => void {
    const tick = async () => {
      await this.refresh();
      if (!this.closed) this.timer = window.setTimeout(tick, EVERY);
    };
    void tick();
    return () => {
      this.closed = true;
      window.clearTimeout(this.timer);
      for (const run of this.shown) run.leave();
    };
  }

  async refresh(): Promise<void> {
    try {
      this.list = (await api.runs()).runs;
      this.loaded = this.reachable = true;
      this.problem = null;
      this.keepUp();
    } catch (error) {
      this.reachable = !(error instanceof ApiError && error.unreachable);
      this.problem = said(error);
    }
  }

  find(name: string): RunSummary | undefined {
    return this.list.find((run) => run.name === name);
  }

  show(names: readonly string[]): void {
    for (const gone of this.shown.filter((run) => !names.includes(run.name))) gone.leave();
    this.shown = names.map((name) => this.shown.find((run) => run.name === name) ?? this.opened(name));
  }

  private opened(name: string): ShownRun {
    const run = new ShownRun(name);
    void run.load(isLive(this.find(name)?.state ?? 'stopped'));
    return run;
  }

  /** A run that was started, resumed, or could not be loaded before, is loaded from its beginning. */
  private keepUp(): void {
    for (const run of this.shown) {
      const live = isLive(this.find(run.name)?.state ?? 'stopped');
      const stale = run.details !== null && run.details.state !== this.find(run.name)?.state && !run.following;
      if ((live && !run.following) || stale || run.problem) void run.load(live);
    }
  }
}
