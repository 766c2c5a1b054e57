/** Where the configurations of runs differ, key by key. */

export interface Difference {
  key: string;
  values: string[];
}

/** Dotted keys whose values are not the same in all; the output folder is no setting. */
export function differences(configs: readonly unknown[]): Difference[] {
  const flat = configs.map((config) => flattened(config));
  const keys = [...new Set(flat.flatMap((values) => [...values.keys()]))].filter((key) => key !== 'output');
  return keys
    .map((key) => ({ key, values: flat.map((values) => values.get(key) ?? '–') }))
    .filter(({ values }) => new Set(values).size > 1);
}

function flattened(value: unknown, prefix = ''): Map<string, string> {
  if (value === null || typeof value !== 'object' || Array.isArray(value)) return new Map([[prefix, written(value)]]);
  const found = new Map<string, string>();
  for (const [key, inner] of Object.entries(value)) {
    for (const [path, text] of flattened(inner, prefix ? `${prefix}.${key}` : key)) found.set(path, text);
  }
  return found;
}

function written(value: unknown): string {
  return typeof value === 'string' ? value : JSON.stringify(value);
}
