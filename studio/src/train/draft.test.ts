import { expect, it } from 'vitest';
import { configuration, drafted, EMPTY } from './draft';

it('sends only what was typed, as numbers, lists and truths', () => {
  const settings = {
    'adapter.r': '8',
    'training.learning_rate': '1e-3',
    'adapter.target_modules': 'q_proj, v_proj',
    'adapter.use_dora': 'true',
    'training.seed': '  ',
    verify: 'false',
  };
  expect(configuration({ ...EMPTY, base: 'x', train: 'work/a.jsonl', settings })).toEqual({
    base: 'x',
    data: { train: 'work/a.jsonl' },
    adapter: { r: 8, target_modules: ['q_proj', 'v_proj'], use_dora: true },
    training: { learning_rate: 0.001 },
    verify: false,
  });
});

it('comes back from a configuration', () => {
  const defaults = { base: 'b', data: { train: '' }, adapter: { r: 16, lora_alpha: 32 }, training: { seed: 0 } };
  const config = { ...defaults, data: { train: 'd', evaluation: 'e' }, adapter: { r: 4, lora_alpha: 32 } };
  const draft = drafted(config, defaults);
  expect(draft.settings).toEqual({ 'adapter.r': '4' });
  expect(configuration(draft)).toEqual({
    base: 'b',
    data: { train: 'd', evaluation: 'e' },
    adapter: { r: 4 },
    training: {},
  });
});
