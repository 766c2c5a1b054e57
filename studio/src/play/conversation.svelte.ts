/** A conversation that goes on in several lanes at once, each with its own answers before it. */

import { cancelled, said, told } from '../api';
import type { Lane, LaneEvent, Likely } from '../types';
import { recall, remember } from '../ui/memory';

export interface Piece {
  text: string;
  logprob: number;
  top: Likely[];
}

export interface Answer {
  lane: Lane;
  pieces: Piece[];
  /** Why it ended; null while it streams. */
  end: string | null;
  problem: string | null;
}

export interface Turn {
  question: string;
  answers: Answer[];
}

export interface Sampling {
  system: string;
  max_tokens: number;
  temperature: number;
  seed: number;
}

export function textOf(answer: Answer): string {
  return answer.pieces.map((piece) => piece.text).join('');
}

export class Conversation {
  turns = $state<Turn[]>((recall('play.turns') as Turn[] | null) ?? []);
  busy = $state(false);
  private control: AbortController | null = null;

  /** Ask every lane at once; each goes on from what it answered itself. */
  async ask(question: string, lanes: readonly Lane[], sampling: Sampling): Promise<void> {
    const control = (this.control = new AbortController());
    this.busy = true;
    const before = this.turns.slice();
    this.turns.push({
      question,
      answers: lanes.map((lane) => ({ lane: { ...lane }, pieces: [], end: null, problem: null })),
    });
    const turn = this.turns.at(-1)!;
    await Promise.all(
      turn.answers.map((answer, i) =>
        this.answered(answer, messages(before, i, question, sampling), sampling, control),
      ),
    );
    if (this.control === control) this.busy = false;
    remember('play.turns', $state.snapshot(this.turns));
  }

  private async answered(
    answer: Answer,
    messages: { role: string; content: string }[],
    { max_tokens, temperature, seed }: Sampling,
    { signal }: AbortController,
  ): Promise<void> {
    const body = { messages, lanes: [$state.snapshot(answer.lane)], max_tokens, temperature, seed };
    try {
      for await (const event of told<LaneEvent>('/api/play/chat', body, signal)) take(answer, event);
      answer.end ??= 'ended early';
    } catch (error) {
      answer.end = cancelled(error) ? 'stopped' : 'failed';
      if (!cancelled(error)) answer.problem = said(error);
    }
  }

  stop(): void {
    this.control?.abort();
  }

  clear(): void {
    this.stop();
    this.turns = [];
    remember('play.turns', []);
  }
}

function take(answer: Answer, event: LaneEvent): void {
  if (event.error) {
    answer.problem = event.error.message;
    answer.end = 'failed';
  } else if (event.finish_reason) answer.end = event.finish_reason;
  else answer.pieces.push({ text: event.text ?? '', logprob: event.logprob ?? 0, top: event.top ?? [] });
}

function messages(
  turns: readonly Turn[],
  lane: number,
  question: string,
  { system }: Sampling,
): { role: string; content: string }[] {
  const earlier = turns.flatMap((turn) => {
    const answer = turn.answers[lane];
    const text = answer ? textOf(answer) : '';
    return text
      ? [
          { role: 'user', content: turn.question },
          { role: 'assistant', content: text },
        ]
      : [];
  });
  const before = system.trim() ? [{ role: 'system', content: system.trim() }] : [];
  return [...before, ...earlier, { role: 'user', content: question }];
}
