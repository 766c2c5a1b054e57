/** Where the reader is: `#/SCREEN/rest/of/it?key=value`. The hash keeps a reload and a shared link where they were. */

export const SCREENS = ['lesson', 'plan', 'train', 'inspect', 'play'] as const;
export type Screen = (typeof SCREENS)[number];

export interface Route {
  screen: Screen;
  rest: string[];
  query: URLSearchParams;
}

export function parsed(hash: string): Route {
  const [path = '', query = ''] = hash.replace(/^#\/?/, '').split('?');
  const [first = '', ...rest] = path.split('/').map(decodeURIComponent);
  const screen = SCREENS.find((name) => name === first) ?? 'lesson';
  return { screen, rest: rest.filter(Boolean), query: new URLSearchParams(query) };
}

export function address(screen: Screen, rest: string[] = [], query: Record<string, string> = {}): string {
  const path = [screen, ...rest].map(encodeURIComponent).join('/');
  const asked = new URLSearchParams(query).toString();
  return `#/${path}${asked ? `?${asked}` : ''}`;
}

class Router {
  route = $state.raw<Route>(parsed(location.hash));

  constructor() {
    addEventListener('hashchange', () => (this.route = parsed(location.hash)));
  }

  go(screen: Screen, rest: string[] = [], query: Record<string, string> = {}): void {
    location.hash = address(screen, rest, query);
  }
}

export const router = new Router();
