/** The symbols in a formula of the planner, with the values that the plan put in. */

import type { Plan } from '../types';

export interface Symbol {
  name: string;
  value: number | null;
  meaning: string;
  /** Where the symbol is a formula itself, such as `layer`. */
  formula: string | null;
}

/** Each once, and those of formulas within formulas after them. */
export function symbolsIn(formula: string, plan: Pick<Plan, 'symbols' | 'formulas'>): Symbol[] {
  const names = new Set(namesIn(formula));
  for (const name of names) namesIn(plan.formulas[name] ?? '').forEach((inner) => names.add(inner));
  return [...names].flatMap((name): Symbol[] => {
    const symbol = plan.symbols[name];
    if (symbol) return [{ name, value: symbol.value, meaning: symbol.meaning, formula: null }];
    const inner = plan.formulas[name];
    return inner === undefined ? [] : [{ name, value: null, meaning: '', formula: inner }];
  });
}

function namesIn(formula: string): string[] {
  return formula.match(/[A-Za-z_][A-Za-z_0-9]*/g) ?? [];
}
