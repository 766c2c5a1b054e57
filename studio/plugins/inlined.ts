import type { Plugin } from 'vite';

/** Puts the one script and the one style sheet of a build into its HTML, so that nothing else need be fetched. */
export function inlined(): Plugin {
  return {
    name: 'inlined',
    enforce: 'post',
    generateBundle(_options, bundle) {
      const page = Object.values(bundle).find((file) => file.fileName.endsWith('.html'));
      if (page?.type !== 'asset') throw new Error('no page in the bundle');
      let html = String(page.source);
      for (const file of Object.values(bundle)) {
        const text = file.type === 'chunk' ? file.code : String(file.source);
        if (file.fileName.endsWith('.js')) {
          html = html.replace(/<script [^>]*src="[^"]*"[^>]*><\/script>/, '');
          // A function, because "$&" in the code would be read as a pattern; "</script" in it would end the element.
          html = html.replace(
            '</body>',
            () => `<script type="module">${text.replaceAll('</script', '<\\/script')}</script>\n</body>`,
          );
        } else if (file.fileName.endsWith('.css')) {
          html = html.replace(/<link [^>]*rel="stylesheet"[^>]*>/, () => `<style>${text}</style>`);
        } else continue;
        delete bundle[file.fileName];
      }
      page.source = html;
    },
  };
}
