import { mount } from 'svelte';
import '../tokens.css';
import '../base.css';
import Lesson from './Lesson.svelte';

const target = document.getElementById('app');
if (target) mount(Lesson, { target });
