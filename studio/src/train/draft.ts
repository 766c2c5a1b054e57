/** The form of a new run as it is typed, and the configuration that it stands for. What is left empty keeps the server's default. */

import type { TrainConfig } from '../types';

export interface Draft {
  name: string;
  base: string;
  train: string;
  evaluation: string;
  /** By dotted key, as typed. */
  settings: Record<string, string>;
}

export const EMPTY: Draft = {
  name: '',
  base: '',
  train: '',
  evaluation: '',
  settings: { 'training.spectrum_every': '10' },
};

export interface Setting {
  key: string;
  label: string;
  hint?: string;
  /** The name of a list in the server's `choices`, or words of its own. */
  choices?: string | string[];
}

export const MAIN: Setting[] = [
  { key: 'adapter.r', label: 'Rank r', hint: 'how much the update can hold' },
  { key: 'adapter.lora_alpha', label: 'lora_alpha', hint: 'scaled by alpha / r' },
  {
    key: 'adapter.target_modules',
    label: 'Target modules',
    choices: ['all-linear', 'attention', 'mlp'],
    hint: 'a preset, or names with commas',
  },
  { key: 'training.learning_rate', label: 'Learning rate', hint: 'at its highest' },
  { key: 'training.batch_size', label: 'Batch size', hint: 'examples in a step' },
  { key: 'training.epochs', label: 'Epochs', hint: 'passes over the data' },
  { key: 'training.evaluate_every', label: 'Evaluate every … steps', hint: 'on the held-out data' },
  { key: 'training.spectrum_every', label: 'Spectra every … steps', hint: 'how each update grows' },
];

export const MORE: Setting[] = [
  { key: 'training.max_steps', label: 'At most so many steps' },
  { key: 'training.checkpoint_every', label: 'Checkpoint every … steps', hint: 'a stopped run goes on from there' },
  { key: 'training.schedule', label: 'Schedule', choices: 'schedules' },
  { key: 'training.warmup', label: 'Warm-up', hint: 'share of the steps' },
  { key: 'training.weight_decay', label: 'Weight decay' },
  { key: 'training.gradient_checkpointing', label: 'Gradient checkpointing', choices: ['true', 'false'] },
  { key: 'training.micro_batch_size', label: 'Micro-batch', hint: 'examples in one forward pass' },
  { key: 'training.seed', label: 'Seed' },
  { key: 'adapter.lora_dropout', label: 'LoRA dropout' },
  { key: 'adapter.use_rslora', label: 'rsLoRA', choices: ['true', 'false'] },
  { key: 'adapter.use_dora', label: 'DoRA', choices: ['true', 'false'] },
  { key: 'data.max_length', label: 'Longest example, tokens' },
  { key: 'data.too_long', label: 'Longer ones', choices: ['drop', 'cut', 'refuse'] },
  { key: 'quantization', label: 'Quantised base', choices: ['nf4', 'int8'] },
  { key: 'dtype', label: 'Type of the weights', choices: 'dtypes' },
  { key: 'verify', label: 'Prove at the end', choices: ['true', 'false'] },
];

/** Raises nothing: what cannot be meant is sent as typed, and the server says what is wrong with it. */
export function configuration(draft: Draft): TrainConfig {
  const config: TrainConfig = {
    base: draft.base.trim(),
    data: { train: draft.train.trim() },
    adapter: {},
    training: {},
  };
  if (!config.base) delete (config as Partial<TrainConfig>).base;
  if (draft.evaluation.trim()) config.data.evaluation = draft.evaluation.trim();
  for (const [key, text] of Object.entries(draft.settings)) {
    if (text.trim()) put(config, key.split('.'), meant(key, text.trim()));
  }
  return config;
}

function put(into: Record<string, unknown>, path: string[], value: unknown): void {
  const [first = '', ...rest] = path;
  if (rest.length === 0) into[first] = value;
  else put((into[first] ??= {}) as Record<string, unknown>, rest, value);
}

function meant(key: string, text: string): unknown {
  if (key.endsWith('target_modules')) return text.includes(',') ? text.split(',').map((name) => name.trim()) : text;
  if (text === 'true' || text === 'false') return text === 'true';
  return text !== '' && Number.isFinite(Number(text)) ? Number(text) : text;
}

/** A form that stands for a configuration: whatever differs from the defaults. */
export function drafted(config: TrainConfig, defaults: TrainConfig): Draft {
  const settings: Record<string, string> = {};
  for (const { key } of [...MAIN, ...MORE]) {
    const value = at(config, key);
    if (value !== undefined && value !== null && JSON.stringify(value) !== JSON.stringify(at(defaults, key))) {
      settings[key] = shown(value);
    }
  }
  return { name: '', base: config.base, train: config.data.train, evaluation: config.data.evaluation ?? '', settings };
}

export function at(config: unknown, key: string): unknown {
  return key
    .split('.')
    .reduce<unknown>((value, part) => (value as Record<string, unknown> | undefined)?.[part], config);
}

export function shown(value: unknown): string {
  if (value === undefined || value === null) return '';
  return Array.isArray(value) ? value.join(', ') : String(value);
}
