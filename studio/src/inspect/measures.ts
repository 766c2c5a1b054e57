/** What of a module a map can show. */

import type { ModuleReport } from '../types';
import { percent, significant, whole } from '../ui/format';

export interface Measure {
  id: string;
  label: string;
  value: (module: ModuleReport) => number | null;
  shown: (value: number) => string;
}

export const MEASURES: Measure[] = [
  {
    id: 'relative',
    label: 'relative size ‖ΔW‖ / ‖W‖',
    value: (m) => m.beside_base?.relative_norm ?? null,
    shown: (v) => percent(v, 2),
  },
  {
    id: 'amplification',
    label: 'amplification of its directions',
    value: (m) => m.beside_base?.amplification ?? null,
    shown: (v) => significant(v),
  },
  { id: 'norm', label: 'size ‖ΔW‖', value: (m) => m.frobenius_norm, shown: (v) => significant(v) },
  { id: 'spectral', label: 'largest singular value', value: (m) => m.spectral_norm, shown: (v) => significant(v) },
  { id: 'stable', label: 'stable rank', value: (m) => m.stable_rank, shown: (v) => significant(v) },
  { id: 'effective', label: 'effective rank', value: (m) => m.effective_rank, shown: (v) => significant(v) },
  { id: 'energy', label: 'rank for 99% of the energy', value: (m) => m.energy_rank_99, shown: whole },
];

/** Those that at least one module has a value of. */
export function available(modules: readonly ModuleReport[]): Measure[] {
  return MEASURES.filter(({ value }) => modules.some((module) => value(module) !== null));
}

/** The share of the energy in the first 1, 2, ... of these singular values. */
export function energies(values: readonly number[]): number[] {
  const total = values.reduce((sum, v) => sum + v * v, 0);
  let kept = 0;
  return values.map((v) => (total > 0 ? (kept += v * v) / total : 1));
}
