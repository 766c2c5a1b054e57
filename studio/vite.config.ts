import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vitest/config';

// The page is served by `twofold studio`; in development (`npm run dev`) its calls go to one that runs on the default port.
export default defineConfig({
  base: './',
  plugins: [svelte()],
  build: { outDir: '../twofold/studio/page', emptyOutDir: true, target: 'es2022', modulePreload: { polyfill: false } },
  server: { proxy: { '/api': 'http://127.0.0.1:7860' } },
  test: { include: ['src/**/*.test.ts'] },
});
