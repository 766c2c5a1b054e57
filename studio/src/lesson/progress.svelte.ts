/** Which exercises are solved: kept by this browser alone. */

import { recall, remember } from '../ui/memory';

export const EXERCISES = ['count', 'growth', 'freeze', 'start', 'scale', 'merge', 'energy'] as const;
export type Exercise = (typeof EXERCISES)[number];

class Progress {
  solved = $state<Exercise[]>(kept());

  solve(exercise: Exercise): void {
    if (this.solved.includes(exercise)) return;
    this.solved = [...this.solved, exercise];
    remember('lesson.solved', this.solved);
  }

  forget(): void {
    this.solved = [];
    remember('lesson.solved', []);
  }
}

function kept(): Exercise[] {
  const stored = recall('lesson.solved');
  return Array.isArray(stored) ? EXERCISES.filter((name) => stored.includes(name)) : [];
}

export const progress = new Progress();
