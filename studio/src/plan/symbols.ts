/** The symbols in a formula of the planner, with the values that the plan put in. */

import type { Plan } from '../types';

export interface Symbol {
  name: string;
  value: number | null;
  meaning: string;
  /** Where the symbol is a formula itself, such as `layer`. */
  formula: string | null;
}

export function symbolsIn(formula: string, plan: Pick<Plan, 'symbols' | 'formulas'>): Symbol[] {
  const names = new Set(formula.match(/[A-Za-z_][A-Za-z_0-9]*/g) ?? []);
  return [...names].flatMap((name): Symbol[] => {
    const symbol = plan.symbols[name];
    if (symbol) return [{ name, value: symbol.value, meaning: symbol.meaning, formula: null }];
    const inner = plan.formulas[name];
    return inner === undefined ? [] : [{ name, value: null, meaning: '', formula: inner }];
  });
}
