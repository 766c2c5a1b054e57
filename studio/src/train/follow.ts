/** A run's events as they happen: by cursor, so that a lost connection, a reload or a killed server loses none. */

import type { RunEvent, RunState } from '../types';

export interface Listener {
  event(event: RunEvent): void;
  /** A resumed run went back to its checkpoint: all its events follow from the first. */
  anew(): void;
  ended(): void;
  connected(yes: boolean): void;
}

const PATIENCE = 1000;
const OVER: readonly RunState[] = ['stopped', 'finished', 'failed'];

/** Follow until the run ends or the returned function is called. The browser's own reconnecting gives up on a refused
 * connection in some states, so each connection is opened anew from the last cursor seen. */
export function follow(name: string, since: string, listener: Listener): () => void {
  let source: EventSource | null = null;
  let timer = 0;
  let cursor = since;

  function open(): void {
    source = new EventSource(`/api/runs/${encodeURIComponent(name)}/events?since=${encodeURIComponent(cursor)}`);
    source.onopen = () => listener.connected(true);
    source.onmessage = (message) => {
      if (message.lastEventId) cursor = message.lastEventId;
      listener.event(JSON.parse(message.data as string) as RunEvent);
    };
    source.addEventListener('anew', () => listener.anew());
    source.addEventListener('state', (message) => {
      const { state } = JSON.parse((message as MessageEvent<string>).data) as { state: RunState };
      if (!OVER.includes(state)) return;
      close();
      listener.ended();
    });
    source.onerror = () => {
      source?.close();
      listener.connected(false);
      timer = window.setTimeout(open, PATIENCE);
    };
  }

  function close(): void {
    window.clearTimeout(timer);
    source?.close();
  }

  open();
  return close;
}
