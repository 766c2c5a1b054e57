import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';
import { inlined } from './plugins/inlined';

// The lesson as one HTML file that opens from a disk with the network off: script and style stand in the page.
export default defineConfig({
  base: './',
  plugins: [svelte(), inlined()],
  build: {
    outDir: '../twofold/studio/page',
    emptyOutDir: false,
    target: 'es2022',
    modulePreload: false,
    cssCodeSplit: false,
    assetsInlineLimit: Infinity,
    rollupOptions: { input: 'lesson.html', output: { inlineDynamicImports: true } },
  },
});
