/** Where real adapters come from: the studio that serves this page, or the page itself where it is one file on a disk. */

export interface AdapterInfo {
  id: string;
  name: string;
  r: number;
  modules: string[];
  base: string | null;
  bytes: number;
}

/** One module's update, taken apart: sum_k u_k s_k v_k^T is the delta, or the mean of equal blocks of it where it is large. */
export interface ModuleView {
  name: string;
  shape: [number, number];
  r: number;
  scale: number;
  singular_values: number[];
  energy: number;
  u: number[][];
  v: number[][];
}

export interface Source {
  adapters(): Promise<AdapterInfo[]>;
  module(adapter: string, name: string): Promise<ModuleView>;
}

async function asked<T>(address: string): Promise<T> {
  const response = await fetch(address);
  const body = (await response.json()) as T & { error?: { message?: string } };
  if (!response.ok) throw new Error(body.error?.message ?? `the studio answered ${response.status}`);
  return body;
}

/** The sample comes first, so that there is always one to look at. */
export const served: Source = {
  async adapters() {
    const [{ adapters }, about] = await Promise.all([
      asked<{ adapters: AdapterInfo[] }>('/api/adapters'),
      asked<{ sample: string }>('/api/about'),
    ]);
    return adapters.toSorted((a, b) => Number(b.id === about.sample) - Number(a.id === about.sample));
  },
  module: (adapter, name) =>
    asked(`/api/adapters/module?adapter=${encodeURIComponent(adapter)}&module=${encodeURIComponent(name)}`),
};

interface Embedded {
  adapter: AdapterInfo;
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
