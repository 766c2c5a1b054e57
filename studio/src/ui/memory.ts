/** What the browser keeps for this reader. Private windows and files on disk may refuse; then nothing is kept, and all else works. */

const PREFIX = 'twofold.';

export function remember(key: string, value: unknown): void {
  try {
    localStorage.setItem(PREFIX + key, JSON.stringify(value));
  } catch {
    // refused: see above
  }
}

export function recall(key: string): unknown {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + key) ?? 'null');
  } catch {
    return null;
  }
}
