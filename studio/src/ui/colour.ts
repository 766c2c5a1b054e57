/** A design token's colour as numbers. Tokens hold one colour for light and one for dark; only an element's own is resolved. */

export type Rgb = readonly [number, number, number];

let probe: HTMLElement | null = null;

function probing(): HTMLElement {
  if (!probe) {
    probe = document.createElement('i');
    probe.hidden = true;
    document.documentElement.append(probe);
  }
  return probe;
}

/** As CSS writes it, `rgb(61, 78, 209)`, in the theme of this moment. */
export function colourOf(token: string): string {
  const element = probing();
  element.style.color = `var(${token})`;
  return getComputedStyle(element).color;
}

export function rgbOf(token: string): Rgb {
  const [r = 0, g = 0, b = 0] = (colourOf(token).match(/\d+/g) ?? []).map(Number);
  return [r, g, b];
}
