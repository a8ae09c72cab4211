{{/*
Where the model is, and who mounts it.
*/}}

{{- define "shardmesh.model.claim" -}}
{{- if eq .Values.model.source "newClaim" -}}
{{- include "shardmesh.name" (list . "model") -}}
{{- else if eq .Values.model.source "existingClaim" -}}
{{- .Values.model.claim.existing -}}
{{- end -}}
{{- end -}}

{{/* What --model says. A worker that shares the claim sees the same path. */}}
{{- define "shardmesh.model.path" -}}
{{- if eq .Values.model.source "hub" -}}
{{- .Values.model.hubId -}}
{{- else if eq .Values.model.source "newClaim" -}}
{{- /* A plus, which no revision can hold: a/b and a-b are two folders, and none is inside another. */ -}}
/models/{{ .Values.model.hubId }}/{{ .Values.model.revision | replace "/" "+" }}
{{- else -}}
{{- printf "/models/%s" .Values.model.path | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* On every pod that mounts the claim. */}}
{{- define "shardmesh.mountsLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
shardmesh.dev/mounts: model
{{- end -}}

{{- define "shardmesh.model.volume" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "shardmesh.model.claim" . }}
    {{- if eq .Values.model.claim.accessMode "ReadOnlyMany" }}
    # Storage that is read-only attaches itself no other way.
    readOnly: true
    {{- end }}
{{- end -}}

{{- define "shardmesh.model.mount" -}}
- name: model
  mountPath: /models
  readOnly: true
{{- end -}}

{{- define "shardmesh.hubTokenEnv" -}}
{{- with include "shardmesh.secret.hubToken" . -}}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.model.hubToken.key }}
{{- end -}}
{{- end -}}
