/** Light or dark: as the system says, until the reader says otherwise. */

import { recall, remember } from './ui/memory';

export type Theme = 'light' | 'dark';

const system = matchMedia('(prefers-color-scheme: dark)');

function isTheme(value: unknown): value is Theme {
  return value === 'light' || value === 'dark';
}

class ThemeChoice {
  chosen = $state<Theme | null>(null);
  system = $state<Theme>(system.matches ? 'dark' : 'light');

  constructor() {
    const stored = recall('theme');
    if (isTheme(stored)) this.choose(stored);
    system.addEventListener('change', () => (this.system = system.matches ? 'dark' : 'light'));
  }

  get current(): Theme {
    return this.chosen ?? this.system;
  }

  choose(theme: Theme): void {
    this.chosen = theme;
    document.documentElement.dataset['theme'] = theme;
    remember('theme', theme);
  }

  toggle(): void {
    this.choose(this.current === 'dark' ? 'light' : 'dark');
  }
}

export const theme = new ThemeChoice();
