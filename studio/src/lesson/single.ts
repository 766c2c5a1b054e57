import { mount } from 'svelte';
import '../tokens.css';
import '../base.css';
import '../layout.css';
import Single from './Single.svelte';

const target = document.getElementById('app');
if (target) mount(Single, { target });
