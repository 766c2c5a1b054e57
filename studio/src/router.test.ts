// @vitest-environment node
import { describe, expect, it, vi } from 'vitest';

vi.stubGlobal('location', { hash: '' });
vi.stubGlobal('addEventListener', () => {});
const { parsed, address } = await import('./router.svelte');

describe('the address', () => {
  it('is read back as it was written', () => {
    const route = parsed(address('train', ['my run/1'], { smooth: '0.9' }));
    expect(route).toMatchObject({ screen: 'train', rest: ['my run/1'] });
    expect(route.query.get('smooth')).toBe('0.9');
  });

  it('leads to the lesson where no screen has that name', () => {
    expect(parsed('#/nowhere').screen).toBe('lesson');
    expect(parsed('').screen).toBe('lesson');
  });
});
