/** Every call that the page makes, typed. All numbers on the screens come from here; errors are the server's own sentences. */

import type {
  About,
  AdapterEntry,
  Combination,
  CombineAsked,
  Comparison,
  CurveOfRanks,
  FileEntry,
  Finding,
  Inspection,
  ModuleView,
  Plan,
  PlanAsked,
  PlayState,
  Preflight,
  Preview,
  ResizeAsked,
  Resized,
  Run,
  RunEvent,
  RunSummary,
  TrainConfig,
  Upload,
} from './types';

/** What the server refused, in its words; status 0 where it could not be reached. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }

  get unreachable(): boolean {
    return this.status === 0;
  }
}

const UNREACHABLE =
  'Twofold Studio does not answer. Is `twofold studio` still running? What was training goes on without it.';

export function said(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export function cancelled(error: unknown): boolean {
  return error instanceof DOMException && error.name === 'AbortError';
}

async function answered(path: string, init: RequestInit): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (cancelled(error)) throw error;
    throw new ApiError(UNREACHABLE, 0);
  }
  if (!response.ok) throw new ApiError(await refusal(response), response.status);
  return response;
}

async function refusal(response: Response): Promise<string> {
  try {
    const body = (await response.json()) as { error?: { message?: string } };
    if (body.error?.message) return body.error.message;
  } catch {
    // no JSON: the status is all there is to say
  }
  return `the server answered ${response.status} ${response.statusText}`;
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await answered(path, { headers: { Accept: 'application/json' }, signal });
  return (await response.json()) as T;
}

async function post<T>(path: string, body: unknown, signal?: AbortSignal): Promise<T> {
  const headers = { 'Content-Type': 'application/json', Accept: 'application/json' };
  const response = await answered(path, { method: 'POST', headers, body: JSON.stringify(body), signal });
  return (await response.json()) as T;
}

function run(name: string, rest = ''): string {
  return `/api/runs/${encodeURIComponent(name)}${rest}`;
}

export const api = {
  about: () => get<About>('/api/about'),
  files: (root: string, path: string) =>
    get<{ entries: FileEntry[] }>(`/api/files?${new URLSearchParams({ root, path })}`),
  upload: async (file: File, signal?: AbortSignal): Promise<Upload> => {
    const path = `/api/uploads?${new URLSearchParams({ name: file.name })}`;
    const headers = { 'Content-Type': 'application/octet-stream' };
    const response = await answered(path, { method: 'POST', headers, body: file, signal });
    return (await response.json()) as Upload;
  },

  plans: (asked: PlanAsked, signal?: AbortSignal) =>
    post<Record<string, Plan>>('/api/plan', { ...asked, compare: true }, signal),

  preview: (config: TrainConfig, signal?: AbortSignal) => post<Preview>('/api/preview', { config }, signal),
  preflight: (config: TrainConfig, signal?: AbortSignal) => post<Preflight>('/api/preflight', { config }, signal),
  runs: (signal?: AbortSignal) => get<{ runs: RunSummary[] }>('/api/runs', signal),
  start: (config: TrainConfig, name: string | null) =>
    post<{ name: string }>('/api/runs', name ? { config, name } : { config }),
  run: (name: string) => get<Run>(run(name)),
  events: (name: string) => get<{ events: RunEvent[]; cursor: string }>(run(name, '/events')),
  stop: (name: string) => post<{ state: string }>(run(name, '/stop'), {}),
  resume: (name: string) => post<{ state: string }>(run(name, '/resume'), {}),

  adapters: () => get<{ adapters: AdapterEntry[] }>('/api/adapters'),
  module: (adapter: string, module: string) =>
    get<ModuleView>(`/api/adapters/module?${new URLSearchParams({ adapter, module })}`),
  inspect: (adapter: string, base: string | null, signal?: AbortSignal) =>
    post<Inspection>('/api/inspect', base ? { adapter, base } : { adapter }, signal),
  lint: (adapter: string, base: string | null) =>
    post<{ findings: Finding[] }>('/api/lint', base ? { adapter, base } : { adapter }),
  compare: (a: string, b: string, signal?: AbortSignal) => post<Comparison>('/api/compare', { a, b }, signal),
  combinePreview: (asked: CombineAsked, signal?: AbortSignal) =>
    post<Combination>('/api/combine/preview', asked, signal),
  combine: (asked: CombineAsked & { output: string }) => post<{ output: string }>('/api/combine', asked),
  curve: (adapter: string, signal?: AbortSignal) => post<CurveOfRanks>('/api/resize/curve', { adapter }, signal),
  resize: (asked: ResizeAsked) => post<Resized>('/api/resize', asked),

  play: () => get<PlayState>('/api/play'),
  open: (base: string) => post<PlayState>('/api/play/open', { base }),
};

/** Events as the server tells them, line by line, over a POST that an EventSource cannot make. */
export async function* told<T>(path: string, body: unknown, signal: AbortSignal): AsyncGenerator<T> {
  const headers = { 'Content-Type': 'application/json', Accept: 'text/event-stream' };
  const response = await answered(path, { method: 'POST', headers, body: JSON.stringify(body), signal });
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop() ?? '';
    for (const block of blocks) {
      const data = dataOf(block);
      if (data && data !== '[DONE]') yield JSON.parse(data) as T;
    }
  }
}

function dataOf(block: string): string {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith('data:'));
  return lines.map((line) => line.slice(5).trimStart()).join('\n');
}
