/** Numbers as the page writes them. */

const UNITS = ['B', 'kB', 'MB', 'GB', 'TB'] as const;

export function whole(value: number): string {
  return Math.round(value).toLocaleString('en-US');
}

/** Bytes in powers of 1000, as files and memory are sold: 999 B, 1.50 MB, 24.0 GB. */
export function bytes(value: number): string {
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(value) : significant(value, 3)} ${UNITS[unit]}`;
}

/** At most `digits` significant digits, no exponent for everyday sizes. */
export function significant(value: number, digits = 3): string {
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e9) return value.toExponential(Math.max(0, digits - 1));
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString('en-US', {
    maximumFractionDigits: decimals,
    minimumFractionDigits: size >= 1000 ? 0 : decimals,
  });
}

export function percent(share: number, digits = 1): string {
  return `${(100 * share).toFixed(digits)}%`;
}

/** Seconds as a person says them: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min. */
export function duration(seconds: number): string {
  if (seconds < 10) return `${significant(seconds, 2)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A number beside an axis: as short as it is exact. */
export function tick(value: number): string {
  const short = Number(value.toPrecision(4));
  return short !== 0 && Math.abs(short) < 1e-4
    ? short.toExponential()
    : short.toLocaleString('en-US', { maximumFractionDigits: 6 });
}
