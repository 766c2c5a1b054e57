/** What the server says and is asked, as it lies in its JSON. Sizes in bytes, times in seconds. */

export interface TrainConfig {
  base: string;
  data: { train: string; evaluation?: string | null; [key: string]: unknown };
  adapter: { r?: number; lora_alpha?: number; target_modules?: string | string[]; [key: string]: unknown };
  training: Record<string, unknown>;
  [key: string]: unknown;
}

export interface About {
  version: string;
  device: string;
  cores: number;
  memory_bytes: number;
  bases: string[];
  roots: { name: string; path: string }[];
  sample: string | null;
  upload_limit: number;
  defaults: { train: TrainConfig; plan: PlanAsked; combine: { method: string; r: number | null; density: number } };
  choices: Record<
    'combine_methods' | 'methods' | 'plan_bases' | 'plan_dtypes' | 'quantization' | 'schedules' | 'dtypes',
    string[]
  >;
}

export interface FileEntry {
  name: string;
  path: string;
  kind: 'folder' | 'adapter' | 'run' | 'data' | 'other';
  bytes: number | null;
}

export interface Upload {
  path: string;
  bytes: number;
  examples: number | null;
}

export interface PlanAsked {
  base: string;
  method: 'lora' | 'full' | 'qlora';
  r: number;
  lora_alpha: number;
  target_modules: string | string[];
  sequence_length: number;
  batch_size: number;
  dtype: string;
  gradient_checkpointing: boolean;
  [key: string]: unknown;
}

/** A share of the memory that is planned. */
export interface Term {
  name: string;
  bytes: number;
  formula: string | null;
  low: number;
  expected: number;
  high: number;
}

export interface Plan {
  base: string;
  method: string;
  parameters: { base: number; trainable: number; fraction: number; modules: number };
  memory: { total: { low: number; expected: number; high: number } };
  terms: Term[];
  symbols: Record<string, { value: number; meaning: string }>;
  formulas: Record<string, string>;
  /** What it would take on a GPU, and on which it would fit. */
  gpu_memory: { low: number; expected: number; high: number };
  gpus: { name: string; cards: string; bytes: number; fits: 'fits' | 'tight' | 'does not fit' }[];
  time: { seconds_per_step: number; tokens_per_second: number; products_per_second: number } | null;
  adapter_file_bytes: number;
  advice: string[];
  budget?: { bytes: number; verdict: string; changes: { change: string; saves: number; verdict: string }[] };
}

export interface DataReport {
  source: string;
  format: string;
  columns: string[];
  examples: number;
  tokens: number;
  supervised_tokens: number;
  longest: number;
  too_long: number;
  lost_supervised_tokens: number;
  unsupervised: number;
}

/** A token's text, and whether its loss counts. */
export type ShownToken = [text: string, supervised: boolean];

export interface Preview {
  train: DataReport;
  samples: ShownToken[][];
}

export interface Preflight extends Preview {
  evaluation: DataReport | null;
  parameters: { trainable: number; base: number; fraction: number };
  memory: { total: { low: number; expected: number; high: number } };
  path: string;
  steps: number;
  seconds: number;
  warnings: string[];
}

export type RunState = 'starting' | 'running' | 'stopping' | 'stopped' | 'finished' | 'failed';

export interface RunSummary {
  name: string;
  state: RunState;
  config: TrainConfig;
  steps: number | null;
  step: number | null;
  loss: number | null;
  started: number | null;
  message: string | null;
}

export interface Run {
  name: string;
  state: RunState;
  config: TrainConfig;
  preflight: Preflight | null;
  report: Report | null;
  /** As the other screens call it, once there is one. */
  adapter: string | null;
  message: string | null;
}

export interface Report {
  adapter: string;
  steps: number;
  seconds: number;
  tokens_per_second: number;
  peak_memory_bytes: number;
  evaluation: Record<string, { loss: number; token_accuracy?: number } | null>;
  verification: { max_abs_logit_difference: number; tolerance: number; passed: boolean } | null;
}

export interface StepEvent {
  event: 'step';
  step: number;
  steps: number;
  epoch: number;
  loss: number;
  learning_rate: number;
  gradient_norm: number;
  tokens: number;
  supervised_tokens: number;
  seconds: number;
  tokens_per_second: number;
  memory_bytes: number;
  seconds_left: number;
}

export interface EvaluatedEvent {
  event: 'evaluated';
  step: number;
  loss: number;
  token_accuracy: number;
  best: boolean;
}

export interface SpectrumEvent {
  event: 'spectrum';
  step: number;
  modules: Record<string, number[]>;
}

export type RunEvent =
  | StepEvent
  | EvaluatedEvent
  | SpectrumEvent
  | { event: 'warned' | 'message'; text: string }
  | { event: 'checkpointed'; step: number; path: string }
  | { event: 'prepared'; steps: number; seconds: number };

export interface AdapterEntry {
  id: string;
  name: string;
  r: number | null;
  modules: string[];
  base: string | null;
  bytes: number;
  /** Why it cannot be used, if so. */
  error: string | null;
}

export interface Finding {
  severity: 'error' | 'warning' | 'note';
  code: string;
  message: string;
}

export interface ModuleReport {
  name: string;
  r: number;
  scale: number;
  frobenius_norm: number;
  spectral_norm: number;
  stable_rank: number;
  effective_rank: number;
  energy_rank_90: number;
  energy_rank_95: number;
  energy_rank_99: number;
  singular_values: number[];
  beside_base: { relative_norm: number; relative_spectral_norm: number; amplification: number } | null;
}

export interface Inspection {
  r: number;
  modules: ModuleReport[];
  findings: Finding[];
  total: { frobenius_norm: number; stable_rank: number; effective_rank: number; energy_rank_99: number } | null;
  suggested_rank: number;
}

export interface ComparedModule {
  name: string;
  cosine: number;
  norms: [number, number];
  output_similarity: number[][];
  input_similarity: number[][];
  output_baseline: number;
  input_baseline: number;
}

export interface Comparison {
  cosine: number;
  modules: ComparedModule[];
  only_first: string[];
  only_second: string[];
  config: Record<string, [unknown, unknown]>;
}

export interface CombineAsked {
  adapters: { id: string; weight: number }[];
  method: string;
  r?: number;
  density?: number;
}

export interface CombinedPlace {
  name: string;
  adapters: number;
  r: number;
  norm: number;
  lost: number;
  off: number;
  needed: number;
  cosine: number | null;
  overlap: number | null;
  by_chance: number | null;
  conflict: number;
}

export interface Combination {
  method: string;
  r: number;
  lost: number;
  modules: CombinedPlace[];
  seconds: number;
}

/** Shares of the energy that ranks 1, 2, ... keep. */
export interface CurveOfRanks {
  total: number[];
  modules: { name: string; energy: number[] }[];
}

export interface ResizeAsked {
  adapter: string;
  output: string;
  r?: number;
  energy?: number;
}

export interface Resized {
  output: string;
  r: number;
  before: number;
  lost: number;
}

export interface PlayState {
  state: 'closed' | 'loading' | 'ready' | 'failed';
  base: string | null;
  message: string | null;
}

export interface Lane {
  adapter: string | null;
  scale: number;
}

export interface Likely {
  token: string;
  logprob: number;
}

/** One piece of one lane's answer, or its end. */
export interface LaneEvent {
  lane: number;
  text?: string;
  token?: string;
  logprob?: number;
  top?: Likely[];
  finish_reason?: string;
  error?: { message: string };
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
