/** What the server says of itself, asked once, and the adapters that it knows. */

import { api, said } from './api';
import type { About, AdapterEntry } from './types';

const PATIENCE = 2000;

class Here {
  about = $state.raw<About | null>(null);
  problem = $state<string | null>(null);
  private asking: Promise<void> | null = null;

  /** Ask, and go on asking while nobody answers. */
  ask(): Promise<void> {
    this.asking ??= this.patient();
    return this.asking;
  }

  private async patient(): Promise<void> {
    while (!this.about) {
      try {
        this.about = await api.about();
        this.problem = null;
      } catch (error) {
        this.problem = said(error);
        await new Promise((done) => setTimeout(done, PATIENCE));
      }
    }
  }
}

export const here = new Here();

class Adapters {
  list = $state.raw<AdapterEntry[]>([]);
  loaded = $state(false);
  problem = $state<string | null>(null);

  get usable(): AdapterEntry[] {
    return this.list.filter((adapter) => !adapter.error);
  }

  get options(): { value: string; label: string }[] {
    return this.usable.map(({ id, name, r }) => ({ value: id, label: `${name} · r ${r} · ${id}` }));
  }

  find(id: string): AdapterEntry | undefined {
    return this.list.find((adapter) => adapter.id === id);
  }

  async refresh(): Promise<void> {
    try {
      this.list = (await api.adapters()).adapters;
      this.loaded = true;
      this.problem = null;
    } catch (error) {
      this.problem = said(error);
    }
  }
}

export const adapters = new Adapters();
