/** Module names as places on a map: a row for each layer, a column for each kind of module. */

export interface Place {
  name: string;
  layer: string;
  kind: string;
}

export interface ModuleGrid {
  layers: string[];
  kinds: string[];
  at: Map<string, Place>;
}

/** `model.layers.3.self_attn.q_proj` is layer 3, kind `q_proj`; what has no number is in layer `–`. */
export function place(name: string): Place {
  const parts = name.split('.');
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  if (at < 0) return { name, layer: '–', kind: parts.at(-1) ?? name };
  const rest = parts.slice(at + 1).filter((part) => part !== 'self_attn' && part !== 'mlp' && part !== 'attention');
  return { name, layer: parts[at]!, kind: rest.join('.') || parts.slice(0, at).join('.') };
}

export function gridOf(names: readonly string[]): ModuleGrid {
  const places = names.map(place);
  const layers = [...new Set(places.map((p) => p.layer))].sort((a, b) => Number(a) - Number(b));
  const kinds = [...new Set(places.map((p) => p.kind))].sort((a, b) => order(a) - order(b));
  return { layers, kinds, at: new Map(places.map((p) => [key(p.layer, p.kind), p])) };
}

/** Kinds as data flows through a layer, where their names say it; others follow as they come. */
const FLOW = ['q_proj', 'k_proj', 'v_proj', 'qkv', 'o_proj', 'gate', 'up_proj', 'down_proj'];

function order(kind: string): number {
  const at = FLOW.findIndex((word) => kind.includes(word));
  return at < 0 ? FLOW.length : at;
}

export function key(layer: string, kind: string): string {
  return `${layer}\u0000${kind}`;
}

export function shortName(name: string): string {
  const { layer, kind } = place(name);
  return layer === '–' ? kind : `layer ${layer} · ${kind}`;
}
