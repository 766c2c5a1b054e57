import type { Plugin } from 'vite';

/** Puts the one script and the one style sheet of a build into its HTML, so that nothing else need be fetched. */
export function inlined(): Plugin {
  return {
    name: 'inlined',
    enforce: 'post',
    generateBundle: {
      // After Vite's own last touches to the script.
      order: 'post',
      handler(_options, bundle) {
        const page = Object.values(bundle).find((file) => file.fileName.endsWith('.html'));
        if (page?.type !== 'asset') throw new Error('no page in the bundle');
        let html = String(page.source);
        for (const file of Object.values(bundle)) {
          const text = file.type === 'chunk' ? file.code : String(file.source);
          if (file.fileName.endsWith('.js')) html = withScript(html, text);
          else if (file.fileName.endsWith('.css')) html = withStyle(html, text);
          else continue;
          delete bundle[file.fileName];
        }
        page.source = html;
      },
    },
  };
}

// The replacements are functions, because "$&" in a text would be read as a pattern; "</script" would end the element.

function withScript(html: string, code: string): string {
  const without = html.replace(/<script [^>]*src="[^"]*"[^>]*><\/script>/, '');
  const safe = code.replaceAll('</script', '<\\/script');
  return without.replace('</body>', () => `<script type="module">${safe}</script>\n</body>`);
}

function withStyle(html: string, rules: string): string {
  return html.replace(/<link [^>]*rel="stylesheet"[^>]*>/, () => `<style>${rules}</style>`);
}
