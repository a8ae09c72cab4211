{{/*
Rules that more than one policy has. DNS servers live in pods, on the node or behind a link-local address: the port says it.
*/}}
{{- define "shardmesh.egress.dns" -}}
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{/* The hub redirects to other hosts for large files: no address can be named. */}}
{{- define "shardmesh.egress.hub" -}}
- ports:
    - port: 443
      protocol: TCP
{{- end -}}

{{/* Nothing where there are no metrics. */}}
{{- define "shardmesh.ingress.metrics" -}}
{{- if .Values.metrics.enabled -}}
- ports:
    - port: {{ include "shardmesh.port.metrics" . }}
      protocol: TCP
  from:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ .Values.networkPolicy.metricsNamespace }}
{{- end -}}
{{- end -}}
