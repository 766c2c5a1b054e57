/** Where real adapters come from: the studio that serves this page, or the page itself where it is one file on a disk. */

import { api } from '../api';
import type { AdapterEntry, ModuleView } from '../types';

export interface Source {
  adapters(): Promise<AdapterEntry[]>;
  module(adapter: string, name: string): Promise<ModuleView>;
}

/** The sample comes first, so that there is always one to look at; what cannot be read is left out. */
export const served: Source = {
  async adapters() {
    const [{ adapters }, { sample }] = await Promise.all([api.adapters(), api.about()]);
    const readable = adapters.filter((one) => one.modules.length > 0);
    return readable.toSorted((a, b) => Number(b.id === sample) - Number(a.id === sample));
  },
  module: api.module,
};

interface Embedded {
  adapter: AdapterEntry;
  modules: ModuleView[];
}

/** What `twofold studio --export` put into the page. */
export function embedded(): Source {
  const text = document.getElementById('your-adapter')?.textContent ?? 'null';
  const held = JSON.parse(text) as Embedded | null;
  return {
    adapters: async () => (held ? [held.adapter] : []),
    async module(_adapter, name) {
      const found = held?.modules.find((m) => m.name === name);
      if (!found) throw new Error(`this page holds no module ${name}`);
      return found;
    },
  };
}
